package bridge_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/outbox"
)

// Everything happens at once to a destination whose answers are at random:
// other definitions, with batches and without, pauses, purges, retries,
// expiry. No record is under way twice at a time, those of a lane are in order,
// arrays are JSON and match their ids, and each record ends once.
func TestBatchRandom(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { synctest.Test(t, func(t *testing.T) { batchRandom(t, seed) }) })
	}
}

// judge answers at random, and checks what comes. Records are told by the name in
// their body, "lane-number" in angle brackets, since ids are not unique.
type judge struct {
	t *testing.T

	mu     sync.Mutex
	random *rand.Rand
	calm   bool                // everything is taken
	bodies map[string]string   // by name
	names  map[string][]string // by id as it is sent
	bad    map[string]bool     // refused always
	gone   map[string]bool     // purged, or delivered
	taken  map[string]int
	flying map[string]bool // names, and lanes
	last   map[string]int  // delivered of a lane
}

func (j *judge) answer(_ context.Context, s sent) bridge.Response {
	j.mu.Lock()
	names := j.read(s)
	took := time.Duration(j.random.IntN(200)) * time.Millisecond
	res := bridge.Response{Status: []int{200, 200, 200, 200, 200, 503, 500, 429, 413, 409, 404, 410, 0, -1, 422}[j.random.IntN(15)]}
	if j.calm {
		res.Status = 200
	}
	lanes := map[string]int{}
	for _, name := range names {
		if j.flying[name] || j.gone[name] {
			j.t.Errorf("%s is under way (%v) or gone (%v), and is sent", name, j.flying[name], j.gone[name])
		}
		j.flying[name] = true
		if j.bad[name] {
			res.Status = 422
		}
		lane, text, _ := strings.Cut(name, "-")
		if lane == "" {
			continue
		}
		var n int
		_, _ = fmt.Sscan(text, &n)
		if n <= max(lanes[lane], j.last[lane]) {
			j.t.Errorf("%s after %d and %d", name, lanes[lane], j.last[lane])
		}
		lanes[lane] = n
	}
	for lane := range lanes {
		if j.flying[lane] {
			j.t.Errorf("lane %s is in two requests", lane)
		}
		j.flying[lane] = true
	}
	switch res.Status {
	case 0:
		res.Err = errors.New("connection reset")
	case -1:
		res = bridge.Response{Own: true, Err: errors.New("no route")}
	case 429:
		res.RetryAfter = 2 * time.Second
	}
	j.mu.Unlock()
	time.Sleep(took)
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, name := range names {
		delete(j.flying, name)
		if res.Status == 200 {
			j.taken[name]++
			j.gone[name] = true
		}
	}
	for lane, n := range lanes {
		delete(j.flying, lane)
		if res.Status == 200 {
			j.last[lane] = n
		}
	}
	return res
}

// read returns the names of the records in a request, and checks its form.
func (j *judge) read(s sent) (names []string) {
	name := func(body []byte) string {
		_, rest, _ := strings.Cut(string(body), "<")
		name, _, ok := strings.Cut(rest, ">")
		if !ok {
			j.t.Errorf("no name in %.100q", body)
		}
		return name
	}
	ids := listed(j.t, s.Header)
	if ids == nil {
		n := name(s.Body)
		if body := j.bodies[n]; !json.Valid([]byte(body)) && string(s.Body) != body {
			j.t.Errorf("body %.100q, want %.100q", s.Body, body)
		}
		return []string{n}
	}
	elements := array(j.t, s.Body)
	if len(ids) != len(elements) || len(ids) > 1 && len(s.Body) > 1<<20 {
		j.t.Errorf("%d ids for %d elements, %d bytes", len(ids), len(elements), len(s.Body))
	}
	for i, e := range elements {
		n := name(e)
		if !slices.Contains(j.names[ids[i]], n) {
			j.t.Errorf("id %q is of %q, not %s", ids[i], j.names[ids[i]], n)
		}
		names = append(names, n)
	}
	return names
}

// known tells of a record with that name, and returns its body.
func (j *judge) known(rng *rand.Rand, name, id string) []byte {
	forms := []string{
		`{"n":"<%s>"}`, `{"n":"<%s>"}`, `{"n":"<%s>"}`, ` {"sw8":7,"n":"<%s>","sw8":{"a":[1]}} `, `{"trace":{"sw8":"x"},"n":"<%s>"}`,
		`{"trace":1,"n":"<%s>"}`, `["<%s>"]`, `"<%s>"`, `<%s> is no JSON`, `{"n":"<%s>"`, "\n{\"\u00fc\\\"\":\"\u20ac\",\"n\":\"<%s>\"}",
	}
	body := fmt.Sprintf(forms[rng.IntN(len(forms))], name)
	switch rng.IntN(60) {
	case 0:
		body = fmt.Sprintf(`{"n":"<%s>","x":"%s"}`, name, strings.Repeat("x", 400<<10))
	case 1:
		body = fmt.Sprintf(`{"n":"<%s>","x":"%s"}`, name, strings.Repeat("x", 1100<<10))
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.bodies[name] = body
	as := strings.ReplaceAll(id, "ü", "%C3%BC")
	j.names[as] = append(j.names[as], name)
	// Not in every lane: where all begin with one, that is a bad deploy, which only a success ends.
	j.bad[name] = rng.IntN(40) == 0 && (name[0] == '-' || name[0] == 'a' || name[0] == 'b')
	return []byte(body)
}

func batchRandom(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 3))
	d := newDeskOn(t, filepath.Join(t.TempDir(), "outbox.db"), outbox.Options{}, bridge.Schedule{})
	j := &judge{
		t: t, random: rand.New(rand.NewPCG(seed, 4)), bodies: map[string]string{}, names: map[string][]string{}, bad: map[string]bool{},
		gone: map[string]bool{}, taken: map[string]int{}, flying: map[string]bool{}, last: map[string]int{},
	}
	d.center.answers(j.answer)
	definition := func() bridge.Destination {
		def := inBatches([]int{0, 1, 2, 5, 10, 100}[rng.IntN(6)], time.Duration(rng.IntN(3))*50*time.Millisecond)
		def.URL = fmt.Sprintf("http://127.0.0.1:%d/notify", 8000+rng.IntN(2))
		def.Concurrency = 1 + rng.IntN(5)
		def.LaneHold = 24 * time.Hour // what leaves its lane has no order
		if rng.IntN(8) == 0 {
			def.MaxAge = 20 * time.Second
		}
		if rng.IntN(3) == 0 {
			def.Rate = bridge.Rate{N: 20, Per: time.Second}
		}
		switch rng.IntN(4) {
		case 0:
			def.TraceBody.SW8 = "trace.sw8"
		case 1:
			def.TraceBody = bridge.TraceFields{}
		case 2:
			def.TraceHeaders = false
		}
		return def
	}
	resume := func() {
		if _, err := d.op.Resume(t.Context(), nc); err != nil {
			t.Fatal(err)
		}
	}
	_, carrier := stored()
	number := map[string]int{}
	d.define(definition())
	for range 80 {
		var recs []bridge.Record
		for range rng.IntN(20) {
			lane := []string{"", "a", "b", "c", "d", "e", "f"}[rng.IntN(7)]
			number[lane]++
			name := fmt.Sprintf("%s-%d", lane, number[lane])
			id := []string{name, "same", `a, "b\`, "ü" + name, "v.1 %" + name}[rng.IntN(5)]
			recs = append(recs, bridge.Record{
				ID: id, Destination: nc, Lane: lane, Ordered: lane != "", Body: j.known(rng, name, id), SW8: carrier.SW8, Correlation: carrier.Correlation,
			})
		}
		if len(recs) > 0 {
			if c, err := d.Append(recs); err != nil || c.Wait(t.Context()) != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Duration(rng.IntN(500)) * time.Millisecond)
		switch rng.IntN(12) {
		case 0, 1:
			d.define(definition())
		case 2:
			d.define()
		case 3:
			d.pause()
		case 4, 5, 6:
			resume()
			d.define(definition())
		case 7:
			d.all(d.op.Purge, bridge.Change{Filter: bridge.Filter{Which: outbox.QueuedOnly, IDs: []string{"same"}}}, nc)
			j.mu.Lock()
			for _, name := range j.names["same"] {
				j.gone[name] = true
			}
			j.mu.Unlock()
		case 8:
			d.all(d.op.Retry, bridge.Change{Filter: bridge.Filter{Which: outbox.QueuedOnly, IDs: []string{`a, "b\`}}}, nc)
		}
	}
	j.mu.Lock()
	j.calm = true
	j.mu.Unlock()
	time.Sleep(time.Second) // for a 410 that is under way, which pauses
	resume()
	def := definition()
	def.Batch.Max = 10
	d.define(def)
	time.Sleep(time.Hour)
	synctest.Wait()

	if s := d.outbox.Stats(); s.Records != 0 {
		t.Errorf("%d records left, %+v", s.Records, d.Destinations())
	}
	if d.define(); len(d.Destinations()) != 0 {
		t.Error("the forwarder takes itself for one with records")
	}
	dead := map[string]bool{}
	if err := d.outbox.List(bridge.Filter{}, func(e bridge.Entry) bool {
		_, rest, _ := strings.Cut(string(e.Body), "<")
		name, _, _ := strings.Cut(rest, ">")
		dead[name] = true
		if string(e.Body) != j.bodies[name] {
			t.Errorf("dead letter %s: %.100q", name, e.Body)
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	for name := range j.bodies {
		ends := j.taken[name]
		if dead[name] {
			ends++
		}
		if ends != 1 && (ends > 1 || !slices.Contains(j.names["same"], name)) {
			t.Errorf("%s was taken %d times, dead letter: %v", name, j.taken[name], dead[name])
		}
	}
	several := 0
	for _, s := range d.center.all() {
		if strings.HasPrefix(s.id, "batch-") {
			several++
		}
	}
	if several < 10 || len(dead) == 0 || len(j.taken) < len(j.bodies)/2 {
		t.Errorf("%d batches, %d dead letters, %d taken of %d: too little has happened", several, len(dead), len(j.taken), len(j.bodies))
	}
}
