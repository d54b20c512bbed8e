"""Before the start: whether every host is fit for the job, each failure one line with host, what and how to mend it."""
