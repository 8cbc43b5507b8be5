"""From files, the hub or --sample to rows, and from rows to those that train, choose and report."""
