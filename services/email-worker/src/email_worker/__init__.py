"""email-worker: composes the mesh's mail and hands it to a mail relay over SMTP."""
