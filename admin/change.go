package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
)

const (
	// maxChangeBody bounds the body of a retry or purge.
	maxChangeBody = 256 << 10
	// maxChangeIDs bounds the webhook-ids in it: each record is compared with all.
	maxChangeIDs = 1000
)

// ChangeRequest says what to retry or purge. What is nil selects all; something
// must be there, or All, so that a slip doesn't purge everything.
type ChangeRequest struct {
	IDs         *[]string `json:"ids,omitempty"`
	Rule        *string   `json:"rule,omitempty"`
	Destination *string   `json:"destination,omitempty"`
	State       *string   `json:"state,omitempty"`      // queued | dead
	OlderThan   *string   `json:"older_than,omitempty"` // a duration since the publish
	All         bool      `json:"all,omitempty"`
	DryRun      bool      `json:"dry_run,omitempty"`
	After       string    `json:"after,omitempty"` // the answer's next, to go on
}

// ErrNoFilter is the error of a ChangeRequest that doesn't say what it is about.
var ErrNoFilter = errors.New("nothing says which records: give ids, rule, destination, state or older_than, or all")

// Change checks r.
func (r ChangeRequest) Change() (bridge.Change, error) {
	c := bridge.Change{DryRun: r.DryRun, After: r.After}
	f := &c.Filter
	some := false
	for _, p := range []struct {
		name  string
		value *string
		to    *string
	}{{"rule", r.Rule, &f.Rule}, {"destination", r.Destination, &f.Destination}} {
		switch {
		case p.value == nil:
			continue
		case *p.value == "": // of a variable that is not set, say
			return c, fmt.Errorf("%s is empty", p.name)
		}
		*p.to, some = *p.value, true
	}
	if r.IDs != nil {
		if n := len(*r.IDs); n == 0 || n > maxChangeIDs {
			return c, fmt.Errorf("%d ids; expected 1 to %d", n, maxChangeIDs)
		}
		for _, id := range *r.IDs {
			if id == "" {
				return c, errors.New("an id is empty")
			}
		}
		f.IDs, some = *r.IDs, true
	}
	if r.State != nil {
		switch *r.State {
		case "queued":
			f.Which = bridge.QueuedOnly
		case "dead":
			f.Which = bridge.DeadOnly
		default:
			return c, fmt.Errorf("state %q: expected queued or dead", *r.State)
		}
		some = true
	}
	if r.OlderThan != nil {
		d, err := time.ParseDuration(*r.OlderThan)
		switch {
		case err != nil || d < 0:
			return c, fmt.Errorf("older_than %q: %w", *r.OlderThan, errNoDuration)
		case d == 0:
			return c, fmt.Errorf("older_than %q: expected more than zero", *r.OlderThan)
		}
		f.OlderThan, some = d, true
	}
	switch {
	case !some && !r.All:
		return c, ErrNoFilter
	case some && r.All:
		return c, errors.New("all together with a filter: give one of them")
	}
	return c, nil
}

// filter is r as the log has it.
func (r ChangeRequest) filter() string {
	const enough = 1000 // of many ids
	r.DryRun, r.After = false, ""
	b, _ := json.Marshal(r) // strings and a bool
	if len(b) > enough {
		return string(b[:enough]) + "..."
	}
	return string(b)
}

// Changed is what a retry or purge has done, or would have.
type Changed struct {
	DryRun bool `json:"dry_run"`
	bridge.Count
	Destinations map[string]bridge.Count `json:"destinations"`
	// Next goes into the next request's after; "": all is done.
	Next string `json:"next,omitempty"`
}

// Retry and Purge are what the requests of that name do.
func Retry(ctx context.Context, o Outbox, r ChangeRequest) (Changed, error) {
	return change(ctx, o.Retry, r)
}

// Purge is Retry's counterpart.
func Purge(ctx context.Context, o Outbox, r ChangeRequest) (Changed, error) {
	return change(ctx, o.Purge, r)
}

// change does what r says. With an error, Changed is what was done before it.
func change(ctx context.Context, do changeFunc, r ChangeRequest) (Changed, error) {
	c, err := r.Change()
	if err != nil {
		return Changed{}, &badChangeError{err}
	}
	done, err := do(ctx, c)
	out := Changed{DryRun: r.DryRun, Destinations: done.Destinations, Next: done.Next}
	for _, n := range done.Destinations {
		out.Queued += n.Queued
		out.Dead += n.Dead
		out.Damaged += n.Damaged
	}
	if errors.Is(err, bridge.ErrCursor) {
		err = &badChangeError{fmt.Errorf("after: %w", err)}
	}
	return out, err
}

// badChangeError is an error of the one who asks.
type badChangeError struct{ error }

func (e *badChangeError) Unwrap() error { return e.error }

type changeFunc func(context.Context, bridge.Change) (bridge.Changed, error)

// FailedChange is the answer to a retry or purge that failed: a problem, and
// what was done before it.
type FailedChange struct {
	Title  string   `json:"title"`
	Status int      `json:"status"`
	Detail string   `json:"detail"`
	Done   *Changed `json:"done,omitempty"`
}

// outboxChange handles a retry or purge; verb is for the log.
func (a *api) outboxChange(verb string, do changeFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		req, status, err := readChange(w, r)
		if err != nil {
			fail(w, status, "bad request", err.Error())
			return
		}
		done, err := change(r.Context(), do, req)
		var bad *badChangeError
		if errors.As(err, &bad) {
			fail(w, http.StatusBadRequest, "bad filter", err.Error())
			return
		}
		log := a.Logger.With("remote", r.RemoteAddr, "filter", req.filter(), "dry_run", req.DryRun,
			"queued", done.Queued, "dead", done.Dead, "more", done.Next != "")
		if err == nil {
			log.Info("outbox " + verb + " through the admin API")
			answer(w, http.StatusOK, done)
			return
		}
		log.Info("outbox "+verb+" through the admin API, not to the end", "error", err)
		problem := FailedChange{"outbox can't be changed", http.StatusInternalServerError, err.Error(), &done}
		if errors.Is(err, bridge.ErrFull) {
			problem.Title, problem.Status = "outbox is full", http.StatusInsufficientStorage
		}
		write(w, problem.Status, "application/problem+json", problem)
	}
}

// readChange reads a request's body. A member that it doesn't know is an error,
// and so is null, so that neither a slip nor a missing value selects everything.
func readChange(w http.ResponseWriter, r *http.Request) (req ChangeRequest, status int, err error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxChangeBody))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return req, http.StatusRequestEntityTooLarge, fmt.Errorf("body of more than %d bytes", maxChangeBody)
	case err != nil:
		return req, http.StatusBadRequest, fmt.Errorf("read body: %w", err)
	}
	var members map[string]*json.RawMessage
	if err = json.Unmarshal(body, &members); err == nil {
		d := json.NewDecoder(bytes.NewReader(body))
		d.DisallowUnknownFields()
		err = d.Decode(&req)
	}
	if err != nil {
		return req, http.StatusBadRequest, fmt.Errorf("body: %s", strings.TrimPrefix(err.Error(), "json: "))
	}
	for name, value := range members {
		if value == nil {
			return req, http.StatusBadRequest, fmt.Errorf("body: %s is null", name)
		}
	}
	return req, 0, nil
}
