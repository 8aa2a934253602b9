"""Images looked at: scanning files, what they say of themselves, reasons, figures, reports, the page."""
