"""The Kubernetes client: renders a stage's Job, submits it, follows it, and says why it waits.

Only this package knows Kubernetes. It never imports a stage's work, and it never ends a Job that
nobody asked it to end.
"""
