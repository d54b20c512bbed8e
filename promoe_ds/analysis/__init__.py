"""Reading what a run recorded: routing statistics and their summaries."""
