"""The demo's model, data and reward: two-digit additions, answered by a small model that is often wrong.

Nothing is downloaded: tokenizer, checkpoint and Parquet files are made on the machine from fixed seeds, and
kept in the user's cache directory.
"""
