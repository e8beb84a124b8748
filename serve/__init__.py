"""The HTTP service on Ray Serve: strategies, compression jobs and variants behind one ingress.

`serve.app.build_app` binds the deployments; `serve.app.run_app` runs them until the process is told
to stop. What this package does not know: how a run is learned.
"""
