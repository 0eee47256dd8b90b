"""The web server of `eval.serve`, and its protection of Gradio's endpoints."""
