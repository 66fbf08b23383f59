"""What the reports of sweeps and of studies share."""

import pathlib

CSS = pathlib.Path(__file__).parent / 'report.css'
