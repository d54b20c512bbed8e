"""What samples are read from: trees of files, parquet, tars, files of torch; one module a format, a
line of `formats` each.
"""
