"""The page of forensics/page.py, as a Gradio Space and as `python app.py` on one's own machine."""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=os.environ.get("PROTOLEAK_MODEL", str(HERE)))
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    arguments = parser.parse_args()
    try:
        from protoleak.forensics.page import make_page
        from protoleak.forensics.report import Examiner

        make_page(Examiner(arguments.model)).launch(server_port=arguments.port)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"app.py: {error}")


if __name__ == "__main__":
    main()
