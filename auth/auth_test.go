package auth_test

import (
	"testing"

	"github.com/throughline-mqtt/throughline/auth"
)

func TestLoopback(t *testing.T) {
	for _, c := range []struct {
		address string
		want    bool
	}{
		{"127.0.0.1:1883", true},
		{"127.8.9.1:0", true},
		{"[::1]:1883", true},
		{"[::ffff:127.0.0.1]:1883", true},
		{"localhost:1883", true},
		{":1883", false},
		{"0.0.0.0:1883", false},
		{"[::]:1883", false},
		{"192.168.1.5:1883", false},
		{"broker.example:1883", false},
		{"localhost.example:1883", false},
		{"127.0.0.1", false}, // no port: not an address to listen on
		{"", false},
	} {
		if got := auth.Loopback(c.address); got != c.want {
			t.Errorf("Loopback(%q) = %v, want %v", c.address, got, c.want)
		}
	}
}

func TestPolicy(t *testing.T) {
	yes, no := true, false
	inside := auth.Listener{Name: "inside", Address: "127.0.0.1:1883"}
	outside := auth.Listener{Name: "outside", Address: ":8883"}
	for _, c := range []struct {
		name           string
		options        auth.Options
		through        string
		connect, allow bool
	}{
		{"loopback alone", auth.Options{Listeners: []auth.Listener{inside}}, "inside", true, true},
		{"loopback beside another", auth.Options{Listeners: []auth.Listener{inside, outside}}, "inside", false, true},
		{"another beside loopback", auth.Options{Listeners: []auth.Listener{inside, outside}}, "outside", false, false},
		{"anonymous everywhere, loopback", auth.Options{Anonymous: &yes, Listeners: []auth.Listener{inside, outside}}, "inside", true, true},
		{"anonymous everywhere, no ACL outside", auth.Options{Anonymous: &yes, Listeners: []auth.Listener{inside, outside}}, "outside", true, false},
		{"anonymous nowhere", auth.Options{Anonymous: &no, Listeners: []auth.Listener{inside}}, "inside", false, true},
		{"unknown listener", auth.Options{Anonymous: &yes, Listeners: []auth.Listener{inside}}, "other", false, false},
		{"no listeners", auth.Options{}, "inside", false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := auth.NewPolicy(c.options)
			who := auth.Client{Listener: c.through, ID: "v7", Username: "ops", Password: []byte("x")}
			if got := p.Connect(who); got != c.connect {
				t.Errorf("Connect = %v, want %v", got, c.connect)
			}
			for _, a := range []auth.Action{auth.Publish, auth.Subscribe} {
				if got := p.Allow(who, a, "fleet/v7/telemetry"); got != c.allow {
					t.Errorf("Allow(%d) = %v, want %v", a, got, c.allow)
				}
			}
		})
	}
}

func TestZeroPolicyDenies(t *testing.T) {
	var p auth.Policy
	if p.Connect(auth.Client{}) || p.Allow(auth.Client{}, auth.Publish, "a") {
		t.Error("the zero policy allows something")
	}
}
