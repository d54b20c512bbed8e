"""Reading what runs recorded: routing statistics and their summaries, benchmarks, comparisons of recipes."""
