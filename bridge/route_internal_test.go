package bridge

import (
	"strings"
	"testing"
)

func TestRouteCredentials(t *testing.T) {
	r, err := newRoute(Destination{URL: "https://center.example/", Basic: &BasicAuth{"Aladdin", "open sesame"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := r.header.Get("Authorization"); got != "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==" { // RFC 7617 section 2
		t.Errorf("Authorization: %q", got)
	}
	for _, tt := range []struct {
		name, want string
		d          Destination
	}{
		{"colon", "has no colon", Destination{URL: "https://center.example/", Basic: &BasicAuth{"a:b", "c"}}},
		{"token url", "token_url: url scheme", Destination{URL: "https://center.example/", OAuth2: &OAuth2{TokenURL: "ftp://idp.example/"}}},
		{"batches without a body", "GET has none", Destination{URL: "http://center.example/", Method: "GET", Batch: Batch{Max: 2}}},
		{"tls without https", "tls is for https alone", Destination{URL: "http://center.example/", TLS: TLS{CAFile: "ca.pem"}}},
	} {
		if _, err := newRoute(tt.d); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}
