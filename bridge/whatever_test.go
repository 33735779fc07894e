package bridge_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/outbox"
)

var whateverSeeds = flag.Int("whatever", 4, "how many seeds TestWhateverHappens tries")

// TestWhateverHappens has a destination answer anything, hang, be paused, be taken away and
// defined otherwise, and an operator retry and purge, all at random. Whatever it
// was: a record is sent by one attempt at a time, and behind those before it in its lane,
// but for ones that have left it; what was taken is not sent again; and once
// the destination is well, every record has been delivered or purged, or is a dead
// letter, and those are delivered when they are retried.
func TestWhateverHappens(t *testing.T) {
	for seed := range uint64(*whateverSeeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel() // it mostly waits for the disk
			synctest.Test(t, func(t *testing.T) { newWhatever(t, seed).run() })
		})
	}
}

// whatever is a world whose every choice is random.
type whatever struct {
	*desk
	random *rand.Rand // of the test's goroutine

	mu       sync.Mutex
	answers  *rand.Rand
	mood     int
	flying   map[string]bool
	taken    map[string]int       // 2xx, by id
	first    map[uint64]time.Time // failures, by Seq
	overtook map[uint64]bool      // records that others of their lane have passed
	left     float64              // records that have left their lane, by metrics that are gone
	most     int                  // attempts under way at a time
	hold     time.Duration        // the least lane_hold there is

	appended map[string]bool // ids
	purged   map[string]bool
}

func newWhatever(t *testing.T, seed uint64) *whatever {
	w := &whatever{
		desk:   newDesk(t, outbox.Options{}),
		random: rand.New(rand.NewPCG(seed, 1)), answers: rand.New(rand.NewPCG(seed, 2)),
		flying: map[string]bool{}, taken: map[string]int{}, first: map[uint64]time.Time{}, overtook: map[uint64]bool{},
		hold: 8 * time.Second, appended: map[string]bool{}, purged: map[string]bool{},
	}
	w.center.answers(w.answer)
	return w
}

// The moods of the destination.
const (
	moodWell = iota
	moodDown
	moodMixed
	moodOfRecords // it depends on the id alone
	moodRefuses
	moodHangs
	moodOwn
	moodUnauthorized
	moodGone
	moods
)

func (w *whatever) answer(ctx context.Context, s sent) bridge.Response {
	seq := w.begin(s.id)
	res := w.choose(ctx, s.id)
	if ctx.Err() != nil {
		res = bridge.Response{Err: ctx.Err()}
	}
	w.end(s.id, seq, res)
	return res
}

func (w *whatever) choose(ctx context.Context, id string) bridge.Response {
	w.mu.Lock()
	mood, dice := w.mood, w.answers.IntN(100)
	wait := time.Duration(w.answers.IntN(300)) * time.Millisecond
	w.mu.Unlock()
	if mood == moodHangs && dice < 80 {
		wait = time.Hour
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
		return bridge.Response{Err: ctx.Err()}
	}
	switch mood {
	case moodDown:
		return bridge.Response{Status: 503, RetryAfter: time.Duration(dice/90) * 20 * time.Second}
	case moodMixed:
		return bridge.Response{Status: []int{500, 429, 400, 404, 302, 503, 204, 200, 200, 200, 200}[min(10, dice%17)]}
	case moodOfRecords:
		switch id[len(id)-1] {
		case '3':
			return bridge.Response{Status: 422}
		case '5':
			return bridge.Response{Status: 500}
		case '7':
			return bridge.Response{Status: 409, RetryAfter: time.Minute}
		}
	case moodRefuses:
		return bridge.Response{Status: 400}
	case moodOwn:
		return bridge.Response{Err: errors.New("no route"), Own: true}
	case moodUnauthorized:
		return bridge.Response{Status: 401}
	case moodGone:
		if dice < 20 {
			return bridge.Response{Status: 410}
		}
	}
	return bridge.Response{Status: 200}
}

// begin checks that id may be sent now, and returns its Seq; 0: it is not queued.
func (w *whatever) begin(id string) (seq uint64) {
	var queued []outbox.Entry
	if err := w.outbox.List(outbox.Filter{Which: outbox.QueuedOnly}, func(e outbox.Entry) bool { queued = append(queued, e); return true }); err != nil {
		w.t.Error(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.flying[id] {
		w.t.Errorf("%s is sent by two attempts at a time", id)
	}
	w.flying[id] = true
	w.most = max(w.most, len(w.flying))
	at := slices.IndexFunc(queued, func(e outbox.Entry) bool { return e.ID == id })
	if at < 0 { // purged while it was on its way here
		return 0
	}
	r := queued[at]
	if !r.Ordered {
		return r.Seq
	}
	for _, e := range queued {
		if e.Ordered && e.Lane == r.Lane && e.Seq < r.Seq && !w.overtook[e.Seq] {
			w.overtook[e.Seq] = true
			if since, failed := w.first[e.Seq]; !failed || time.Since(since) < w.hold {
				w.t.Errorf("%s (%d) is sent before %s (%d) of its lane %s, which failed first at %v (now %v)", id, r.Seq, e.ID, e.Seq, r.Lane, since, time.Now())
			}
		}
	}
	return r.Seq
}

func (w *whatever) end(id string, seq uint64, res bridge.Response) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.flying, id)
	if res.Err == nil && res.Status/100 == 2 {
		w.taken[id]++
	} else if _, ok := w.first[seq]; !ok && seq > 0 {
		w.first[seq] = time.Now()
	}
}

func (w *whatever) setMood(m int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mood = m
}

// definition is one at random.
func (w *whatever) definition() bridge.Destination {
	d := to(nc)
	d.Concurrency = 1 + w.random.IntN(8)
	d.LaneHold = w.hold << w.random.IntN(4)
	d.Headers = map[string]string{"X-Version": fmt.Sprint(w.random.IntN(3))}
	if w.random.IntN(3) == 0 {
		d.Rate = bridge.Rate{N: 1 + w.random.IntN(50), Per: time.Second}
	}
	if w.random.IntN(4) == 0 {
		d.MaxAge = 20 * time.Minute
	}
	d.Timeout = time.Duration(1+w.random.IntN(10)) * time.Second
	return d
}

func (w *whatever) append() {
	n := 1 + w.random.IntN(12)
	recs := make([]bridge.Record, n)
	for i := range recs {
		id := fmt.Sprintf("r%d", len(w.appended))
		w.appended[id] = true
		lane := w.random.IntN(6)
		recs[i] = bridge.Record{ID: id, Rule: "r", Destination: nc, Body: []byte(`{}`)}
		if lane > 0 {
			recs[i].Lane, recs[i].Ordered = fmt.Sprint("lane", lane), true
		}
	}
	c, err := w.Append(recs)
	if err == nil {
		err = c.Wait(w.t.Context())
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// purge deletes some at random.
func (w *whatever) purge() {
	var ids []string
	err := w.outbox.List(outbox.Filter{}, func(e outbox.Entry) bool {
		if w.random.IntN(6) == 0 {
			ids = append(ids, e.ID)
		}
		return true
	})
	if err != nil {
		w.t.Fatal(err)
	}
	if len(ids) == 0 {
		return
	}
	for _, id := range ids {
		w.purged[id] = true // or delivered just now
	}
	w.all(w.op.Purge, bridge.Change{Filter: outbox.Filter{IDs: ids}}, nc)
}

func (w *whatever) step() {
	switch w.random.IntN(14) {
	case 0, 1, 2, 3:
		w.append()
	case 4, 5:
		w.setMood(w.random.IntN(moods))
	case 6:
		w.setMood(moodOfRecords)
	case 7:
		w.setMood(moodWell)
	case 8:
		w.define(w.definition())
	case 9:
		left, _ := w.metric(laneLeft)
		w.define()
		if _, ok := w.metric(laneLeft); !ok { // nothing was queued: it counts from 0 again
			w.left += left
		}
		time.Sleep(time.Duration(w.random.IntN(60)) * time.Second)
		w.define(w.definition())
	case 10:
		if err := w.Pause(w.t.Context(), nc); err != nil {
			w.t.Fatal(err)
		}
	case 11:
		if err := w.Resume(w.t.Context(), nc); err != nil && !errors.Is(err, bridge.ErrNoDestination) {
			w.t.Fatal(err)
		}
	case 12:
		w.purge()
	case 13:
		w.all(w.op.Retry, bridge.Change{}, nc)
	}
	time.Sleep(time.Duration(w.random.ExpFloat64() * float64(6*time.Second)))
}

func (w *whatever) run() {
	for range 150 {
		w.step()
	}
	// All is well from here on, and due at once. What hangs ends within 10 s.
	w.setMood(moodWell)
	d := to(nc)
	d.LaneHold = w.hold
	w.define(d)
	if err := w.Resume(w.t.Context(), nc); err != nil {
		w.t.Fatal(err)
	}
	time.Sleep(30 * time.Second)
	if s := w.outbox.Stats(); s.Records != 0 {
		w.t.Errorf("%d records are queued at a destination that is well: %v; %+v", s.Records, w.queuedIDs(), w.Destinations())
	}
	dead := map[string]string{}
	if err := w.outbox.List(outbox.Filter{Which: outbox.DeadOnly}, func(e outbox.Entry) bool { dead[e.ID] = e.Reason; return true }); err != nil {
		w.t.Fatal(err)
	}
	for id := range w.appended {
		if w.taken[id] == 0 && !w.purged[id] && dead[id] == "" {
			w.t.Errorf("%s is lost", id)
		}
	}
	w.all(w.op.Retry, bridge.Change{}, nc)
	time.Sleep(30 * time.Second)
	if s := w.outbox.Stats(); s.Records != 0 || s.DeadLetters != 0 {
		w.t.Errorf("%d records and %d dead letters after these were retried", s.Records, s.DeadLetters)
	}
	for _, id := range slices.Sorted(maps.Keys(w.appended)) {
		if n := w.taken[id]; n > 1 || n == 0 && !w.purged[id] {
			w.t.Errorf("%s was taken %d times", id, n)
		}
	}
	w.wantMetric("throughline_delivery_in_flight{destination="+nc+"}", 0)
	w.wantMetric("throughline_delivery_breaker_open{destination="+nc+"}", 0)
	w.wantMetric(paused, 0)
	if left, _ := w.metric(laneLeft); int(left+w.left) < len(w.overtook) {
		w.t.Errorf("%d records were passed by others of their lane, %v have left it", len(w.overtook), left+w.left)
	}
	if w.most > 16 {
		w.t.Errorf("%d attempts at a time", w.most)
	}
	for _, e := range w.log.with("level=ERROR") {
		if strings.Contains(e, "can't be read") {
			w.t.Error(e)
		}
	}
}
