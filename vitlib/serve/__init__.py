"""Real-time inference over HTTP: request bytes, one queue, batches, JSON.

The files, from the network to the model and back:

    run.py, workers.py, settings.py  socket, signals, processes, limits
    guard.py                         limits of one connection, keys, CORS
    app.py, handlers.py, openapi.py  routes
    bodies.py, forms.py              request bodies: limits, compression, format, forms
    protocol.py, writer.py           JSON of requests, JSON of answers
    dispatcher.py, pending.py        from a request's images to its rows
    url_fetch.py                     images by URL
    batcher.py                       batches of images of many requests
    core.py                          the model
    compute_lock.py                  the cores of a CPU, shared by decoding and computing
    errors.py                        errors as status and JSON
    metrics.py                       metrics for Prometheus
    page/                            the page that a browser shows at /

batcher.py, core.py and compute_lock.py need only vitlib's own requirements; the other
files need vitlib[serve].
"""
