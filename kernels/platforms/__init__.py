"""What ops share: which implementation runs on which platform."""
