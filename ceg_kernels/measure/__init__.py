"""Clock, roofs and rows: how the project measures. See docs of each module."""
