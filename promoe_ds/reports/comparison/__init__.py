"""Recipes trained alike and judged alike, over several seeds; promoe-compare calls
`experiment.compare`.

`candidates` are compared if that is fair; `experiment` the folder and what must not change in it;
`runner` the child processes; `judge` what each child does after training; `results` the figures and
their statistics; `page` the report. In files, whose format is older than these names, a candidate
is a "contender".
"""
