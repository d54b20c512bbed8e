"""What judges samples of a packaged data set without any download: `table.JUDGES`, by data set."""
