"""Names that other libraries have for what Stepwell names otherwise, so that an error can point to ours."""
