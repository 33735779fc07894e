package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// componentHTTPServer is SkyWalking's id of Go's HTTP server (component-libraries.yml).
const componentHTTPServer = 5004

// center is the demo's notification center: an HTTP server that continues the trace
// from the request body, as a receiver of a fleet would.
type center struct {
	address string // host:port
	server  *http.Server
	tracer  tracectx.Tracer
	extract *tracectx.Extractor

	mu  sync.Mutex
	got []centerDelivery
}

// centerDelivery is one request that arrived.
type centerDelivery struct {
	key       string // vin-seq
	id        string // webhook-id
	body      []byte
	traceID   string
	segmentID string // of the center's own segment
	at        time.Time
	err       error // what was wrong with it
}

func newCenter(ctx context.Context, tracer tracectx.Tracer) (*center, error) {
	x, err := tracectx.NewExtractor(tracectx.Fields{SW8: tracectx.HeaderSW8, Correlation: tracectx.HeaderCorrelation})
	if err != nil {
		return nil, err
	}
	var listen net.ListenConfig
	l, err := listen.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	c := &center{address: l.Addr().String(), tracer: tracer, extract: x}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /notify", c.notify)
	c.server = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = c.server.Serve(l) }() // ends with close; a failure shows as deliveries that are missing
	return c, nil
}

func (c *center) notify(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if err != nil {
		http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
		return
	}
	ctx, outcome := c.extract.FromJSON(body)
	span := c.tracer.StartEntry(tracectx.SpanOptions{
		Operation: "POST:/notify", Parent: ctx, Layer: tracectx.LayerHTTP, Component: componentHTTPServer,
	})
	defer span.End()
	span.Tag("http.method", r.Method)

	d := centerDelivery{
		id: r.Header.Get("webhook-id"), body: body, at: time.Now(),
		traceID: span.Context().TraceID, segmentID: span.Context().SegmentID,
	}
	var t telemetry
	switch err := json.Unmarshal(body, &t); {
	case err != nil:
		d.err = fmt.Errorf("body is not JSON: %w", err)
	case outcome.Status != tracectx.Found:
		d.err = errors.New("no trace context in the body")
	}
	d.key = deliveryKey(t.VIN, t.Seq)
	c.mu.Lock()
	c.got = append(c.got, d)
	c.mu.Unlock()
	w.WriteHeader(http.StatusNoContent)
}

func (c *center) deliveries() []centerDelivery {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.got)
}

func (c *center) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.got)
}

func (c *center) close() { c.server.Close() }
