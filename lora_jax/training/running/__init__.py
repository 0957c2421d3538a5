"""What the loop uses while steps run: batches placed ahead, measurements read late, the speed."""
