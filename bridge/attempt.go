package bridge

import (
	"context"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// componentGoHTTP is SkyWalking's id of Go's HTTP client.
const componentGoHTTP = 5005

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

	parent, err := tracectx.Decode(tracectx.Carrier{SW8: rec.SW8, Correlation: rec.Correlation})
	if err != nil {
		f.meters.undecodable.Inc()
	}
	local := f.bridge.tracer.StartLocal(tracectx.SpanOptions{Operation: "deliver/" + f.name, Parent: parent})
	defer local.End()
	local.Tag("rule", rec.Rule)
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
	defer exit.End()
	exit.Tag("url", r.safeURL)
	exit.Tag("http.method", r.method)

	ctx := exit.Context()
	carrier := ctx.Carrier()
	a := attempted{traceID: ctx.TraceID, carrier: carrierNone}

	header := r.header.Clone()
	id := r.webhookID(rec.ID)
	header.Set("webhook-id", id)
	header.Set("webhook-timestamp", timestamp)
	header.Set("X-Throughline-Attempt", number)
	if r.def.IdempotencyKey {
		header.Set("Idempotency-Key", id)
	}
	header.Del(tracectx.HeaderSW8)
	header.Del(tracectx.HeaderCorrelation)
	if r.def.TraceHeaders {
		a.carrier = carrierHeaders
		header.Set(tracectx.HeaderSW8, carrier.SW8)
		if carrier.Correlation != "" {
			header.Set(tracectx.HeaderCorrelation, carrier.Correlation)
		}
	}
	body, place := r.place(rec.Body, carrier)
	if place != blocked {
		a.carrier = carrierBody
	}
	if place == replaced {
		f.meters.replaced.Inc()
	}

	if len(r.def.SigningKeys) > 0 {
		header.Set("webhook-signature", signature(r.def.SigningKeys, id, timestamp, body))
	}

	limited, cancel := context.WithTimeout(f.bridge.ctx, r.timeout)
	defer cancel()
	a.res = r.sender.Send(limited, &Request{Method: r.method, URL: r.url, Header: header, Body: body})
	f.unauthorized(a.res)

	if a.res.Status != 0 {
		status := strconv.Itoa(a.res.Status)
		exit.Tag("http.status_code", status)
		exit.Tag("status_code", status)
	}
	if a.res.Class() != Success {
		exit.Error(failureText(a.res))
	}
	return a
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
	out, place := setField(out, r.sw8, c.SW8)
	if r.correlation != nil && c.Correlation != "" {
		out, _ = setField(out, r.correlation, c.Correlation)
	}
	return out, place
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
