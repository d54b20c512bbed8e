"""Expert load, specialisation and comparison: one log reader, one chart system, one page."""
