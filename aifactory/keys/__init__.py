"""`aifactory keys`: who may ask the endpoint, and how much."""
