"""What the files of deploy/observability are made with, and held against. Nothing of it runs in a deployment."""
