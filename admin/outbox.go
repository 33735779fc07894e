package admin

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/throughline-mqtt/throughline/bridge"
)

const (
	// defaultListed is how many records a listing has that asks for no number.
	defaultListed = 100
	// maxListed bounds one listing, so that a million records don't fill the memory.
	maxListed = 10_000
)

// Record is a queued record or a dead letter as the API shows it.
type Record struct {
	ID          string    `json:"id"`
	State       string    `json:"state"` // queued | dead | damaged
	Seq         uint64    `json:"seq"`
	Rule        string    `json:"rule"`
	Destination string    `json:"destination"`
	Lane        *string   `json:"lane,omitempty"` // absent: no lane
	Topic       string    `json:"topic"`
	ClientID    string    `json:"clientid"`
	Published   time.Time `json:"published"`
	Attempts    int       `json:"attempts"`
	Next        time.Time `json:"next,omitzero"` // no attempt before
	LastError   string    `json:"last_error,omitempty"`
	TraceID     string    `json:"trace_id"`
	Generation  string    `json:"rules_generation"`
	Bytes       int       `json:"body_bytes"`

	// Path, Query and Headers are what was rendered of the request beside its body. Header values are there when one record
	// is shown, with [redacted] where a secret goes, which is not stored.
	Path    string   `json:"path,omitempty"`
	Query   string   `json:"query,omitempty"`
	Headers []Header `json:"headers,omitempty"`

	Reason string    `json:"reason,omitempty"` // why it is dead
	Buried time.Time `json:"buried,omitzero"`
	Status int       `json:"status,omitempty"` // of the last answer

	// Body and Response are there when one record is shown; the *Base64 ones if they are not UTF-8.
	Body           string `json:"body,omitempty"`
	BodyBase64     []byte `json:"body_base64,omitempty"`
	Response       string `json:"response,omitempty"`
	ResponseBase64 []byte `json:"response_base64,omitempty"`
}

// Header is one that was rendered for a record.
type Header struct {
	Name  string `json:"name"`
	Value string `json:"value,omitempty"`
}

// Listing is an answer with several records.
type Listing struct {
	Records []Record `json:"records"`
	// More says that there are further ones, which the limit cut off.
	More bool `json:"more"`
	// Paused are the destinations that nothing is sent to; not set when one record is shown.
	Paused []PausedDestination `json:"paused,omitempty"`
}

// List reads the records that f selects. A zero f.Limit means 100; more than 10,000 are never read.
func List(o Outbox, f bridge.Filter) (Listing, error) {
	return list(o, f, false)
}

// Show reads every record and dead letter of that webhook-id, with its body. A
// webhook-id that a rule sets may be shared by several.
func Show(o Outbox, id string) (Listing, error) {
	return list(o, bridge.Filter{ID: id}, true)
}

func list(o Outbox, f bridge.Filter, whole bool) (Listing, error) {
	if f.Limit <= 0 {
		f.Limit = defaultListed
	}
	limit := min(f.Limit, maxListed)
	f.Limit = limit + 1
	l := Listing{Records: []Record{}}
	if !whole {
		l.Paused = pausedOf(o.Destinations())
	}
	err := o.List(f, func(e bridge.Entry) bool {
		if len(l.Records) == limit {
			l.More = true
			return false
		}
		l.Records = append(l.Records, record(e, whole))
		return true
	})
	return l, err
}

func record(e bridge.Entry, whole bool) Record {
	r := Record{
		ID: e.ID, State: "queued", Seq: e.Seq, Rule: e.Rule, Destination: e.Destination,
		Topic: e.Topic, ClientID: e.ClientID, Published: e.Published.UTC(),
		Attempts: e.Attempts, LastError: e.LastError, TraceID: e.TraceID, Generation: e.Generation,
		Bytes: len(e.Body), Path: e.Path, Query: e.Query, Reason: e.Reason, Status: e.Status,
	}
	for _, h := range e.Headers {
		shown := Header{Name: h.Name}
		if whole {
			shown.Value = strings.ToValidUTF8(strings.ReplaceAll(h.Value, "\x00", "[redacted]"), "\uFFFD")
		}
		r.Headers = append(r.Headers, shown)
	}
	if e.Ordered {
		r.Lane = &e.Lane
	}
	if !e.Next.IsZero() {
		r.Next = e.Next.UTC()
	}
	if e.Dead {
		r.State, r.Buried = "dead", e.Buried.UTC()
	}
	if e.Err != nil {
		r.State, r.LastError = "damaged", e.Err.Error()
	}
	if whole {
		r.Body, r.BodyBase64 = text(e.Body)
		r.Response, r.ResponseBase64 = text(e.Response)
	}
	return r
}

func text(b []byte) (string, []byte) {
	if utf8.Valid(b) {
		return string(b), nil
	}
	return "", b
}

func (a *api) outbox(w http.ResponseWriter, r *http.Request) {
	f, err := ParseFilter(r.URL.Query())
	if err != nil {
		fail(w, http.StatusBadRequest, "bad filter", err.Error())
		return
	}
	a.list(w, func() (Listing, error) { return List(a.Outbox, f) })
}

func (a *api) outboxShow(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	l, err := Show(a.Outbox, id)
	if err == nil && len(l.Records) == 0 {
		fail(w, http.StatusNotFound, "no such record", "no record or dead letter has the webhook-id "+quote(id))
		return
	}
	a.list(w, func() (Listing, error) { return l, err })
}

func (a *api) list(w http.ResponseWriter, read func() (Listing, error)) {
	l, err := read()
	if err != nil {
		a.Logger.Error("list outbox", "error", err)
		fail(w, http.StatusInternalServerError, "outbox can't be read", err.Error())
		return
	}
	answer(w, http.StatusOK, l)
}

// errNoDuration is what is wrong with an older_than.
var errNoDuration = errors.New("expected a duration such as 90s, 30m or 24h")

// ParseFilter reads a filter from the parameters id, rule, destination, state
// (queued or dead), older_than (a duration since the publish) and limit. Any other
// parameter is an error, so that a misspelt one doesn't select everything. What is
// wrong with a value is wrapped, without the parameter's name.
func ParseFilter(q url.Values) (bridge.Filter, error) {
	var f bridge.Filter
	for name, values := range q {
		if len(values) != 1 {
			return f, fmt.Errorf("parameter %q is given %d times", name, len(values))
		}
		v := values[0]
		var err error
		switch name {
		case "id":
			f.ID = v
		case "rule":
			f.Rule = v
		case "destination":
			f.Destination = v
		case "state":
			switch v {
			case "queued":
				f.Which = bridge.QueuedOnly
			case "dead":
				f.Which = bridge.DeadOnly
			default:
				err = errors.New("expected queued or dead")
			}
		case "older_than":
			if f.OlderThan, err = time.ParseDuration(v); err != nil || f.OlderThan < 0 {
				err = errNoDuration
			}
		case "limit":
			if f.Limit, err = strconv.Atoi(v); err != nil || f.Limit < 1 || f.Limit > maxListed {
				err = fmt.Errorf("expected 1 to %d", maxListed)
			}
		default:
			err = errors.New("unknown; there are id, rule, destination, state, older_than and limit")
		}
		if err != nil {
			return f, fmt.Errorf("parameter %s=%q: %w", name, v, err)
		}
	}
	return f, nil
}

// usage is what is stored for one destination, or in all.
type usage struct {
	Records     int       `json:"records"`
	Bytes       int64     `json:"bytes"`
	Limit       int64     `json:"limit_bytes"` // 0: none
	Oldest      time.Time `json:"oldest,omitzero"`
	DeadLetters int       `json:"dead_letters"`
	DeadBytes   int64     `json:"dead_letter_bytes"`
}

func (a *api) outboxStats(w http.ResponseWriter, _ *http.Request) {
	s := a.Outbox.Stats()
	type stats struct {
		usage
		Destinations map[string]usage `json:"destinations"`
	}
	out := stats{usageOf(s.Usage), make(map[string]usage, len(s.Destinations))}
	for name, u := range s.Destinations {
		out.Destinations[name] = usageOf(u)
	}
	answer(w, http.StatusOK, out)
}

func usageOf(u bridge.Usage) usage {
	return usage{u.Records, u.Bytes, u.Limit, u.Oldest, u.DeadLetters, u.DeadBytes}
}
