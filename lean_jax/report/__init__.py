"""What a run found, for people: tables, pictures, progress."""
