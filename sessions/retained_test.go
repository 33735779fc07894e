package sessions_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/throughline-mqtt/throughline/sessions"
)

func retain(r *sessions.Retained, topics ...string) {
	for _, t := range topics {
		r.Set(&sessions.Message{Topic: t, Payload: []byte("x"), Retain: true})
	}
}

func topics(ms []*sessions.Message) string {
	var names []string
	for _, m := range ms {
		names = append(names, m.Topic)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// The examples of MQTT 5, 4.7.1 to 4.7.3.
func TestRetainedMatch(t *testing.T) {
	var r sessions.Retained
	retain(&r, "a", "a/b", "a/b/c", "/a", "a/", "a//b", "b", "$SYS/x", "$SYS", "a/$x")
	for filter, want := range map[string]string{
		"a":        "a",
		"a/b":      "a/b",
		"a/#":      "a a/ a/$x a//b a/b a/b/c",
		"a/b/#":    "a/b a/b/c",
		"a/b/c/#":  "a/b/c",
		"+":        "a b",
		"+/#":      "/a a a/ a/$x a//b a/b a/b/c b",
		"+/+":      "/a a/ a/$x a/b",
		"/+":       "/a",
		"a/+":      "a/ a/$x a/b",
		"a/+/b":    "a//b",
		"+/b/c":    "a/b/c",
		"#":        "/a a a/ a/$x a//b a/b a/b/c b",
		"$SYS/#":   "$SYS $SYS/x",
		"$SYS/+":   "$SYS/x",
		"c":        "",
		"c/#":      "",
		"A":        "",
		"a/b/c/d":  "",
		"+/+/+/+":  "",
		"$SYS/x/#": "$SYS/x",
	} {
		if got := topics(r.Match(filter)); got != want {
			t.Errorf("%q matches %q, want %q", filter, got, want)
		}
	}
}

func TestRetainedSetAndRemove(t *testing.T) {
	var r sessions.Retained
	retain(&r, "a/b/c", "a", "a/b/c") // one a topic
	r.Set(&sessions.Message{Topic: "a/b"})
	r.Set(&sessions.Message{Topic: "nothing/there"})
	if n := r.Len(); n != 2 {
		t.Errorf("%d retained, want 2", n)
	}
	r.Set(&sessions.Message{Topic: "a/b/c", Payload: []byte("new")})
	if got := r.Match("a/b/c"); len(got) != 1 || string(got[0].Payload) != "new" {
		t.Errorf("got %v, want the newest", got)
	}
	r.Set(&sessions.Message{Topic: "a/b/c"})
	r.Set(&sessions.Message{Topic: "a"})
	if n := r.Len(); n != 0 || topics(r.Match("#")) != "" {
		t.Errorf("%d retained, want none", n)
	}
}

func TestRetainedExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r sessions.Retained
		retain(&r, "a/always")
		r.Set(&sessions.Message{Topic: "a/soon", Payload: []byte("x"), Expires: time.Now().Add(time.Second)})
		if got := topics(r.Match("#")); got != "a/always a/soon" {
			t.Errorf("before: %q", got)
		}
		time.Sleep(time.Second)
		if got := topics(r.Match("#")); got != "a/always" {
			t.Errorf("after: %q", got)
		}
		if n := r.Sweep(time.Now()); n != 1 || r.Len() != 1 {
			t.Errorf("%d swept, %d left", n, r.Len())
		}
	})
}

// FuzzRetainedMatch: what Match finds is what a comparison level by level finds.
func FuzzRetainedMatch(f *testing.F) {
	f.Add("a/b a $x/y", "a/#")
	f.Add("/ // a//b", "+/+")
	f.Fuzz(func(t *testing.T, names, filter string) {
		levels := strings.Split(filter, "/")
		for i, level := range levels {
			if strings.ContainsAny(level, "+#") && (len(level) > 1 || level == "#" && i < len(levels)-1) {
				return // no valid filter
			}
		}
		var r sessions.Retained
		var want []string
		for name := range strings.FieldsSeq(names) {
			if strings.ContainsAny(name, "+#") {
				continue
			}
			retain(&r, name)
			if matches(levels, name) && !slices.Contains(want, name) {
				want = append(want, name)
			}
		}
		slices.Sort(want)
		if got := topics(r.Match(filter)); got != strings.Join(want, " ") {
			t.Errorf("%q of %q: got %q, want %q", filter, names, got, want)
		}
	})
}

func matches(filter []string, name string) bool {
	if strings.HasPrefix(name, "$") && (filter[0] == "+" || filter[0] == "#") {
		return false
	}
	levels := strings.Split(name, "/")
	for i, f := range filter {
		switch {
		case f == "#":
			return true
		case i == len(levels), f != "+" && f != levels[i]:
			return false
		}
	}
	return len(levels) == len(filter)
}

func BenchmarkRetainedMatch(b *testing.B) {
	var r sessions.Retained
	for i := range 100_000 {
		retain(&r, fmt.Sprintf("fleet/v%d/state", i))
	}
	for b.Loop() {
		if len(r.Match("fleet/v77/#")) != 1 {
			b.Fatal("not found")
		}
	}
}
