"""The threads and loops that join state machines and transports: scheduler, server and worker."""
