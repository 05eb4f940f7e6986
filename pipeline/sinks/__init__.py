"""From predicted rows to Parquet parts that appear whole, and back: what is visible is what is done."""
