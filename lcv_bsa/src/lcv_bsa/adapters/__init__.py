"""How other libraries' models run sparse. Nothing here imports a host: models are known by their structure."""
