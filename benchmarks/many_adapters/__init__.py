"""What many adapters of one base cost, trained together or served in one batch."""
