"""Real-time inference over HTTP: request bytes, one queue, batches, JSON.

The files, from the network to the model and back:

    run.py, workers.py    socket, signals, processes
    guard.py              one connection: limits, keys, CORS
    app.py, openapi.py    routes
    bodies.py, forms.py   request bodies: limits, compression, format, forms
    protocol.py           JSON of requests and answers
    dispatcher.py         from a request's images to its rows; url_fetch.py fetches images by URL
    batcher.py            batches of images of many requests
    core.py               the model; compute_lock.py and parallel.py share the cores of a CPU
    errors.py             errors as status and JSON
    metrics.py            counters for Prometheus
    page/                 the page that a browser shows at /

All but batcher.py, core.py, compute_lock.py and parallel.py need vitlib[serve].
"""
