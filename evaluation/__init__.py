"""What a checkpoint is worth: splits of a data set, predictions, metrics, robustness."""
