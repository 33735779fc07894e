package tracectx_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// A notification center that gets the trace context in the body of each request: it
// continues the trace with an EntrySpan that refers to the broker's ExitSpan.
func ExampleExtractor_FromJSON() {
	extractor, err := tracectx.NewExtractor(tracectx.Fields{SW8: "sw8", Correlation: "sw8-correlation"})
	if err != nil {
		fmt.Println(err)
		return
	}
	tracer := tracectxtest.NewRecorder("notification-center") // in earnest: a skywalking.Tracer

	center := func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
		if err != nil {
			http.Error(w, "body not readable", http.StatusBadRequest)
			return
		}
		ctx, outcome := extractor.FromJSON(body)
		span := tracer.StartEntry(tracectx.SpanOptions{
			Operation: "POST:/notify",
			Parent:    ctx,
			Layer:     tracectx.LayerHTTP,
		})
		defer span.End()
		fmt.Println(outcome.Status, "from", ctx.Service, ctx.Endpoint)
	}

	body := `{"event":"hard-brake","vin":"V7","sw8":"1-dHJhY2U=-c2VnbWVudA==-1-bXF0dC1icm9rZXI=-YnJva2VyQDE=-ZGVsaXZlci9oYXJkLWJyYWtl-MTI3LjAuMC4xOjgwODA="}`
	center(httptest.NewRecorder(), httptest.NewRequest("POST", "/notify", strings.NewReader(body)))

	entry := tracer.Segments()[0].Spans[0]
	fmt.Println(entry.Kind, entry.Operation, "in trace", tracer.Segments()[0].TraceID)
	fmt.Println("refers to span", entry.Refs[0].SpanID, "of segment", entry.Refs[0].SegmentID)
	// Output:
	// found from mqtt-broker deliver/hard-brake
	// Entry POST:/notify in trace trace
	// refers to span 1 of segment segment
}
