"""Methods for processes that denoise."""
