"""Memory, traffic and time of a run before it starts: shapes go through the real layers, no data,
no weights.
"""
