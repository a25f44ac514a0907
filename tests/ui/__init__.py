"""Tests that need ComfyUI's front end in a real browser."""
