// Command center is the smallest notification center that continues the trace:
// it reads the SkyWalking context from the agreed field of the request body, or of
// each element if the destination has batches, and prints what came. It answers 204.
//
//	go run ./docs/examples/center -address 127.0.0.1:8080
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"time"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// maxBody is more than the broker's default packet size limit, which bounds what a rule can send.
const maxBody = 4 << 20

func main() {
	address := flag.String("address", "127.0.0.1:8080", "host:port to listen on")
	flag.Parse()

	x, err := tracectx.NewExtractor(tracectx.Fields{SW8: "sw8", Correlation: "sw8-correlation"})
	if err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /notify", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
			return
		}
		ids, elements := []string{r.Header.Get("webhook-id")}, []json.RawMessage{body}
		if list := r.Header.Get("X-Throughline-Ids"); list != "" { // the destination has batches
			if json.Unmarshal([]byte("["+list+"]"), &ids) != nil || json.Unmarshal(body, &elements) != nil || len(ids) != len(elements) {
				http.Error(w, "no array with an id for each element", http.StatusBadRequest)
				return
			}
		}
		for i, element := range elements {
			ctx, _ := x.FromJSON(element)
			fmt.Printf("webhook-id %s attempt %s\n  trace %s, called by %s of %s\n  %s\n",
				ids[i], r.Header.Get("X-Throughline-Attempt"), ctx.TraceID, ctx.Endpoint, ctx.Service, element)
		}
		w.WriteHeader(http.StatusNoContent)
	})
	s := &http.Server{Addr: *address, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	log.Printf("notification center on http://%s/notify", *address)
	log.Fatal(s.ListenAndServe())
}
