"""What people and programs read: of a probe, of a file, of a job."""
