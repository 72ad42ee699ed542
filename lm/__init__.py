"""Language modeling: text in, a trained, evaluated and generating model out."""
