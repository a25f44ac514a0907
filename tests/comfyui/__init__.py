"""A real ComfyUI for the tests: `server` starts one, `api` talks to it, `conftest` has the fixtures."""
