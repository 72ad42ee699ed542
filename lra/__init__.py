"""Long Range Arena and recall tasks as an evaluation of mixers."""
