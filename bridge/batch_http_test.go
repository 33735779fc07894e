package bridge_test

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/tracectx"
)

// Over HTTP, to a receiver that hangs, breaks off, answers before it has read, and
// fails after it has taken everything: each record arrives,
// none before the one ahead of it in its lane, and what comes again has its id.
func TestBatchFaultyReceiver(t *testing.T) {
	const lanes, each = 10, 60
	ids := []string{"%d-%d", `say "%d, %d"`, `\%d\%d`, "ü%d.%d", "%d,%d"}
	key := []byte("a key of 24 bytes, first")
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(1, 2))
	last := map[int]int{} // taken, by lane
	again, several := 0, 0
	take := func(r *http.Request, body []byte) {
		if !verifies(key, sent{id: r.Header.Get("webhook-id"), Request: &bridge.Request{Header: r.Header, Body: body}}) {
			t.Errorf("signature of %.100q", body)
		}
		elements, list := array(t, body), listed(t, r.Header)
		if len(elements) != len(list) {
			t.Errorf("%d ids for %d elements", len(list), len(elements))
			return
		}
		if len(list) > 1 {
			several++
		}
		for i, e := range elements {
			var m struct {
				ID      string
				Lane, N int
				SW8     string
			}
			if err := json.Unmarshal(e, &m); err != nil {
				t.Error(err)
			}
			if ctx, err := tracectx.Decode(tracectx.Carrier{SW8: m.SW8}); err != nil || ctx.TraceID != fmt.Sprintf("trace-%d-%d", m.Lane, m.N) {
				t.Errorf("%s has trace %+v, %v", m.ID, ctx, err)
			}
			if list[i] != m.ID {
				t.Errorf("id %q for %q", list[i], m.ID)
			}
			switch {
			case m.N == last[m.Lane]+1:
				last[m.Lane]++
			case m.N > last[m.Lane]:
				t.Errorf("%s after %d", m.ID, last[m.Lane])
			default:
				again++
			}
		}
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		what := rng.IntN(24)
		if what == 0 && strings.HasPrefix(r.Header.Get("webhook-id"), "batch-") {
			w.Header().Set("Connection", "close")
			w.WriteHeader(http.StatusRequestEntityTooLarge) // unread
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		switch what {
		case 1:
			w.WriteHeader(http.StatusBadGateway)
			return
		case 2, 3:
			take(r, body)
			if what == 3 {
				panic(http.ErrAbortHandler)
			}
			w.WriteHeader(http.StatusInternalServerError)
			return
		case 4:
			panic(http.ErrAbortHandler)
		case 5:
			take(r, body)
			mu.Unlock()
			<-r.Context().Done() // until the timeout
			mu.Lock()
			return
		}
		take(r, body)
	}))
	defer srv.Close()
	d := inBatches(20, 2*time.Millisecond)
	d.URL = srv.URL + "/notify"
	d.Timeout = 200 * time.Millisecond
	d.Concurrency = 4
	d.SigningKeys = [][]byte{key}
	d.LaneHold = time.Hour
	p := start(t, filepath.Join(t.TempDir(), "outbox.db"), quick, d)
	defer p.stop(t)
	parent, _ := stored()
	var commit *bridge.Commit
	var err error
	for n := range each {
		var recs []bridge.Record
		for lane := range lanes {
			c := parent
			c.TraceID = fmt.Sprintf("trace-%d-%d", lane, n+1)
			id := fmt.Sprintf(ids[n%len(ids)], lane, n+1)
			wire := id
			if strings.Contains(id, "ü") {
				wire = strings.NewReplacer("ü", "%C3%BC", ".", "%2E").Replace(id)
			}
			size := 10
			if n%10 == 3 {
				size = 100 << 10
			}
			recs = append(recs, bridge.Record{
				ID: id, Destination: nc, Lane: fmt.Sprint(lane), Ordered: true, SW8: c.Carrier().SW8,
				Body: fmt.Appendf(nil, `{"id":%q,"lane":%d,"n":%d,"x":"%s"}`, wire, lane, n+1, strings.Repeat("x", size)),
			})
		}
		if commit, err = p.Append(recs); err != nil {
			t.Fatal(err)
		}
	}
	if err := commit.Wait(t.Context()); err != nil { // else none may be queued yet
		t.Fatal(err)
	}
	await(t, "all to be delivered", func() bool { return p.outbox.Stats().Records == 0 })
	mu.Lock()
	defer mu.Unlock()
	if dead := p.outbox.Stats().DeadLetters; dead > 0 {
		t.Errorf("%d dead letters", dead)
	}
	for lane := range lanes {
		if last[lane] != each {
			t.Errorf("lane %d: %d of %d", lane, last[lane], each)
		}
	}
	if again == 0 || several < 10 {
		t.Errorf("%d batches, %d records again: too little has happened", several, again)
	}
}
