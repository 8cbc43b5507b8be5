"""Label metrics, intervals and paired tests."""
