package bridge

import (
	"context"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tidwall/gjson"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// componentGoHTTP is SkyWalking's id of Go's HTTP client.
const componentGoHTTP = 5005

// Names of headers in the form that net/http has them in, which it would else make of each name for each attempt.
const (
	headerID          = "Webhook-Id"
	headerTimestamp   = "Webhook-Timestamp"
	headerSignature   = "Webhook-Signature"
	headerAttempt     = "X-Throughline-Attempt"
	headerSW8         = "Sw8"
	headerCorrelation = "Sw8-Correlation"

	headerIdempotency   = "Idempotency-Key"
	headerAuthorization = "Authorization"
)

// attempted is what an attempt came to.
type attempted struct {
	res     Response
	traceID string
	carrier string // where the trace context went
}

// attempt sends rec once, under a trace segment of its own that refers to the
// stored context and is reported when the attempt ends. rec.Attempts counts
// the attempts before this one.
func (f *forwarder) attempt(r *route, rec *Record) attempted {
	now := time.Now()
	timestamp := strconv.FormatInt(now.Unix(), 10)
	number := strconv.Itoa(rec.Attempts + 1)
	s := f.startSpans(r, rec, number, now)
	defer s.end()

	ctx := s.exit.Context()
	carrier := ctx.Carrier()
	a := attempted{traceID: ctx.TraceID, carrier: carrierNone}

	id := r.webhookID(rec.ID)
	header := r.headers(id, timestamp, number)
	if len(rec.Headers) > 0 {
		f.addRendered(header, r, rec)
	}
	if r.def.TraceHeaders {
		a.carrier = carrierHeaders
		header[headerSW8] = []string{carrier.SW8}
		if carrier.Correlation != "" {
			header[headerCorrelation] = []string{carrier.Correlation}
		}
	}
	body, place := []byte(nil), blocked
	if !r.bodiless {
		body, place = r.place(rec.Body, carrier)
	}
	if place != blocked {
		a.carrier = carrierBody
	}
	if place == replaced {
		f.meters.replaced.Inc()
	}
	if r.batches() {
		f.meters.batch.Observe(1)
		if place != blocked || gjson.ValidBytes(body) {
			body = slices.Concat([]byte{'['}, body, []byte{']'})
			header.Set(headerIDs, quotedID(id))
		}
	}

	a.res = f.send(r, &Request{Method: r.method, URL: r.urlOf(rec), Header: header, Body: body}, id, timestamp)
	s.answered(a.res)
	return a
}

// spans are a record's in one attempt.
type spans struct{ local, exit tracectx.Span }

// startSpans opens the segment of an attempt at rec, which is that number.
func (f *forwarder) startSpans(r *route, rec *Record, number string, now time.Time) spans {
	parent, err := tracectx.Decode(tracectx.Carrier{SW8: rec.SW8, Correlation: rec.Correlation})
	if err != nil {
		f.meters.undecodable.Inc()
	}
	local := f.bridge.tracer.StartLocal(tracectx.SpanOptions{Operation: "deliver/" + f.name, Parent: parent})
	local.Tag("rule", rec.Rule)
	if rec.Generation != "" {
		local.Tag("rules.generation", rec.Generation)
	}
	local.Tag("webhook.id", rec.ID)
	local.Tag("attempt", number)
	local.Tag("queued.ms", strconv.FormatInt(now.Sub(rec.Published).Milliseconds(), 10))
	local.Tag("mq.topic", rec.Topic)
	exit := local.StartExit(tracectx.SpanOptions{
		Operation: r.operation,
		Peer:      r.peer,
		Layer:     tracectx.LayerHTTP,
		Component: componentGoHTTP,
	})
	exit.Tag("url", r.safeURLOf(rec))
	exit.Tag("http.method", r.method)
	return spans{local: local, exit: exit}
}

func (s spans) answered(res Response) {
	if res.Status != 0 {
		status := strconv.Itoa(res.Status)
		s.exit.Tag("http.status_code", status)
		s.exit.Tag("status_code", status)
	}
	if res.Class() != Success {
		s.exit.Error(failureText(res))
	}
}

func (s spans) end() {
	s.exit.End()
	s.local.End()
}

// headers are those of a request but for the trace context and the signature.
func (r *route) headers(id, timestamp, number string) http.Header {
	h := make(http.Header, len(r.header)+5)
	maps.Copy(h, r.header)                    // the values are shared: nobody changes them in place
	values := []string{id, timestamp, number} // one allocation for all
	h[headerID], h[headerTimestamp], h[headerAttempt] = values[0:1:1], values[1:2:2], values[2:3:3]
	if r.def.IdempotencyKey {
		h[headerIdempotency] = values[0:1:1]
	}
	return h
}

// send signs a request and sends it.
func (f *forwarder) send(r *route, req *Request, id, timestamp string) Response {
	if len(r.def.SigningKeys) > 0 {
		req.Header[headerSignature] = []string{signature(r.def.SigningKeys, id, timestamp, req.Body)}
	}
	limited, cancel := context.WithTimeout(f.bridge.ctx, r.timeout)
	defer cancel()
	res := r.sender.Send(limited, req)
	f.unauthorized(res)
	return res
}

// place returns body with the carrier in the agreed fields. It is blocked when
// sw8 has no place in there: none is agreed on, or the body is no JSON object.
// body itself is not changed.
func (r *route) place(body []byte, c tracectx.Carrier) ([]byte, placement) {
	if r.sw8 == nil || !isObject(body) {
		return body, blocked
	}
	const names = 64 // room for the names and punctuation
	out := make([]byte, len(body), len(body)+len(c.SW8)+len(c.Correlation)+names)
	copy(out, body)
	return r.put(out, c)
}

// put is place in an object, whose array it uses if that has room.
func (r *route) put(object []byte, c tracectx.Carrier) ([]byte, placement) {
	object, place := setField(object, r.sw8, c.SW8)
	if r.correlation != nil && c.Correlation != "" {
		object, _ = setField(object, r.correlation, c.Correlation)
	}
	return object, place
}

// webhookID is the id as it is sent, and signed.
func (r *route) webhookID(id string) string {
	if len(r.def.SigningKeys) > 0 {
		return signedID(id)
	}
	return headerValue(id)
}

// headerValue makes an id fit for a header: one that holds bytes which HTTP
// forbids or readers disagree on is percent-encoded, the same way every time.
func headerValue(id string) string {
	if strings.IndexFunc(id, func(c rune) bool { return c < ' ' || c > '~' }) < 0 {
		return id
	}
	return url.PathEscape(id)
}
