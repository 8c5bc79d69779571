"""Device meshes, the processes of a job, and their failure detection."""
