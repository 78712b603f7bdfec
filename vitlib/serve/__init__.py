"""Real-time inference over HTTP: bytes -> a queue -> batches -> JSON.

protocol.py and forms.py say what requests and answers look like; core.py computes, batcher.py makes
batches of many requests, engine.py brings both together; http.py, app.py and run.py are the server;
page/ is what a browser sees at /. All but core.py, batcher.py and turns.py need vitlib[serve].
"""
