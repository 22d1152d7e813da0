"""Charts and pictures, as SVG and PNG bytes."""
