"""Expert load from routing.jsonl: what a run does, what is wrong with it, placements, and the
report.
"""
