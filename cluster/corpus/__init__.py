"""From text files to a prepared corpus: vocabularies, and Parquet shards grouped by length."""
